"""Language models that are asked, not trained: conversations in, texts out (the catalogue's group `llm`)."""
