"""The stages of a recipe: short loops that know no method."""
