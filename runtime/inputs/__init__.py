"""From a picture and words to pixel values and token ids."""
