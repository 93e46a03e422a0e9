"""What ``ghostssm prune`` does, step by step; imported once the verb runs, because it needs PyTorch."""
