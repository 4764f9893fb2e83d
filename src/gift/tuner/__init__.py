"""GIFT as a PEFT method."""
