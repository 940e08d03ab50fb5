"""Crops, augmentation and mixing."""
