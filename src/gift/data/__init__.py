"""Images to fine-tune and to explain with."""
