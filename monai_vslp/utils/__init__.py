"""Small helpers without knowledge of images, networks or slides."""
