"""Neural network modules of this project; all other network code comes from the segmentation packages."""
