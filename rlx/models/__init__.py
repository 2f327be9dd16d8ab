"""What acts and is trained: language models behind the Policy protocol."""
