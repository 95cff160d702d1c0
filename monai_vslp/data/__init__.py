"""Tables, proportions, raters, images, slides, bags and synthetic tissue."""

from monai_vslp.data.bags import (
    FeatureBagDataset,
    bag_keys,
    collate_bags,
    fingerprint,
    predicted_and_given,
    prepare_bags,
)
from monai_vslp.data.cohort import Cohort, Record, read_cohort, write_table
from monai_vslp.data.confidences import FileStacks, confidence_items
from monai_vslp.data.factories import bag_collation, class_indices, class_names, feature_bags, split_items
from monai_vslp.data.folds import assign_folds, divide, write_fold_table
from monai_vslp.data.images import check_images, image_size, list_images, read_image
from monai_vslp.data.item_random import ItemRandomDataset
from monai_vslp.data.proportions import ProportionLabel, combine_raters, parse_entry, parse_row
from monai_vslp.data.raters import simulate_raters
from monai_vslp.data.regularization import (
    ConfidenceStacks,
    HeldOutMaps,
    RegularizerBatches,
    prepare_refinement,
    stack_keys,
)
from monai_vslp.data.sampling import sample_cells, sample_proportions
from monai_vslp.data.self_training import PseudoLabelTokens, prepare_tokens

__all__ = [
    "Cohort",
    "ConfidenceStacks",
    "FeatureBagDataset",
    "FileStacks",
    "assign_folds",
    "bag_collation",
    "bag_keys",
    "class_indices",
    "class_names",
    "feature_bags",
    "split_items",
    "HeldOutMaps",
    "ItemRandomDataset",
    "ProportionLabel",
    "PseudoLabelTokens",
    "prepare_tokens",
    "sample_cells",
    "sample_proportions",
    "Record",
    "RegularizerBatches",
    "check_images",
    "collate_bags",
    "confidence_items",
    "combine_raters",
    "divide",
    "fingerprint",
    "image_size",
    "list_images",
    "parse_entry",
    "parse_row",
    "predicted_and_given",
    "prepare_bags",
    "prepare_refinement",
    "read_cohort",
    "read_image",
    "simulate_raters",
    "stack_keys",
    "write_fold_table",
    "write_table",
]
