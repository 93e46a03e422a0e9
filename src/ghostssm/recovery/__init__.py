"""Recovery: steps that give a pruned mixer back what its output lost."""
