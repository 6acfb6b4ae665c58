"""mmengine's training loop for detection and segmentation, free of Ray."""
