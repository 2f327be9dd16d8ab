"""A finished or running run as tables, charts and one self-contained HTML page: read -> tables, plots -> page."""
