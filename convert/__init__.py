"""Foreign checkpoints to native model folders, and back."""
