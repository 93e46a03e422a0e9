"""Pages that show what was removed, what it cost and what it bought; and how notebooks show plans and comparisons."""
