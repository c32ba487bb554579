"""Readers of official files, each with its refusals. people.py first, which holds people as flat
arrays, then coco.py, which reads them. joints.py knows the names of joints, weights.py published
encoders."""
