"""
All tests but the core's (test_qgalore.py): python -m pytest tests

Begin with common.py: a tiny model, settings, and scripts run as processes. test_house.py holds the
rules of the house, same_losses.py is a program that compares two versions bit for bit.
"""
