"""What the pages show: diagrams drawn by code, plots and tables of what was measured."""
