"""Methods that approximate what is not kept by means, weights or low rank."""
