"""Crops, augmentation, mixup."""
