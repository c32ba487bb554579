"""Everything to look at. grids.py first (labelled grids), then skeletons.py (conditions, overlays).

training.py: what pre-training shows. results.py: what the downstream tasks show. curves.py: what a
log says of its run.
"""
