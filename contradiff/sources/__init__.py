"""Read raw data sets as they are published, and write shards. Nothing is downloaded.

`listing` defines the list of all images. `imagenet` chooses one of the modules that make this list:
`folder` (class folders and Kaggle's download), `archive` with `tars` (ILSVRC's archives) or
`parquet`. `image_check` checks the images, and `packing` puts them into shards. `transfer_set`
reads the data set of the stage `transfer`; `cifar` and `cifar_pickle` read CIFAR for it. This
package may import `data`, and all that `data` may import.
"""
