"""What training writes and everybody reads: model directories and checkpoints."""
