"""Files: bounded reading of what others wrote, whole writing of our own, and signals that end neither half way."""
