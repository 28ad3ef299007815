"""Images: files, sets, augmentation and samples."""
