"""Pages and charts of what was removed, what it cost and what it bought; how notebooks show plans and comparisons."""
