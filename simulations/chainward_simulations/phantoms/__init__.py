"""Generated chest radiographs with reports and tables: what a simulation has instead of patients."""
