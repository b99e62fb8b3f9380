"""Raw data sets, in the forms in which they are published => shards. Nothing is downloaded.

Read `listing` first (the list of all images). These modules make the list: `folder` (class folders
and Kaggle's download), `archive` with `tars` (ILSVRC's archives) and `parquet`. `imagenet` chooses
one of them. `image_check` and `packing` put the images into shards. `transfer_set`, with `cifar`
and `cifar_pickle`, reads the data set of the transfer stage. This package may import `data`, and
all that `data` may import.
"""
