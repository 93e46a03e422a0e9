"""Pages that show what was removed, what it cost and what it bought; and how notebooks show plans and comparisons."""

PAGE_FILE = "report.html"
"""In a checkpoint's folder, the page."""
RECORD_FILE = "report.json"
"""What it shows besides the plan and the manifest."""
