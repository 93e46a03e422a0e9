"""From windows of text to what methods decide on: layer statistics, samples of the output, and gate gradients."""
