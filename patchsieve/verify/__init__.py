"""Does a bundle give what the checkpoint gives?"""
