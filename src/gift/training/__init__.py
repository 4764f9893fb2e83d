"""Training: one function on top of the Hugging Face Trainer."""
