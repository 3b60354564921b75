"""Teachers that read what only the hospital may see: reports and tables. Nothing here ever leaves the site."""
