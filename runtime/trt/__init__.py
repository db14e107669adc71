"""TensorRT itself: libraries, engines, devices."""
