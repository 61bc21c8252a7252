"""Model families, one file each: config class, builder, published sizes."""
