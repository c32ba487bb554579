"""The numbers of the downstream tasks, each read beside its stage script.

pose.py, pose_metrics.py: 2-D pose. ranking.py, reid.py: ReID. attributes.py. text.py: text-to-image
ReID. features.py: one vector per picture. probe.py: what frozen features know. recognition.py:
others' models that say what a picture shows (annotate.py), and if its pose is the wanted one.
"""
