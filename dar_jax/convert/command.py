"""`--mode=convert`: official checkpoints to model directories, and back."""
