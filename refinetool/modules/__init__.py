"""Neural modules of this project; everything else about models comes from the segmentation packages."""
