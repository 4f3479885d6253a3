"""What Sphinx needs to build the site from pages that GitHub shows as they are."""
