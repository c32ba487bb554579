"""What every program needs and no paper speaks of.

config.py first (a stage's keys), then errors.py (how a program refuses), then what a question
names: files, pictures, tars, seeds, runs (a run's folder), loading, process (locks, orphans),
gradient_cache, chunks, diffusion, quiet.
"""
