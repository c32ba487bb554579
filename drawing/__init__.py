"""Everything to look at: pictures.py (skeletons, overlays, labelled grids), then sheets.py (what a stage shows)."""
