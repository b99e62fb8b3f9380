"""Before a run: what it will cost (`plan`), and parameters for a folder of images (`own_images`).

This package imports neither `report` nor `pretrained`.
"""
