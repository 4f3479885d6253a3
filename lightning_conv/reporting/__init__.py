"""Reports for people: Markdown, figures and progress bars."""
