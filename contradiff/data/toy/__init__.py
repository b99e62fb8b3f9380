"""A small drawn ImageNet: twelve classes of objects before natural-looking backgrounds.

The tree has the layout of ImageNet's classification task as it is unpacked from Kaggle, so that
one reader serves both. A class has *tendencies* in outline, colour and background, none of which
determines it, and every image varies in position, scale, rotation and light, and sometimes shows
a distractor or an occluder. Objects are large and backgrounds soft, since a first stage with f = 4
leaves a 32-pixel image only 8 x 8 latent cells.
"""
