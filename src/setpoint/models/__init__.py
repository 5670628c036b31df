"""Backbones, assembled from `setpoint.nn` by a configuration and the objects passed in."""

from setpoint.models.checkpoints import from_folder, from_transformers
from setpoint.models.initialize import DepthScaledNormal, LayerIndexNormal, Normal, XavierNormal
from setpoint.models.inpainting import InpaintingConfig, InpaintingUNet
from setpoint.models.labels_to_image import LabelsToImage, LabelsToImageConfig
from setpoint.models.position import Learned, Llama3Rotary, Position, Rotary, Sinusoidal
from setpoint.models.resnet import BasicBlock, Bottleneck, CifarStem, ImageNetStem, ResNet, ResNetConfig
from setpoint.models.stack import MLP, Attention, SwiGLU
from setpoint.models.transformer import Transformer, TransformerConfig
from setpoint.models.vision import ClassToken, MeanPooling, VisionConfig, VisionTransformer

__all__ = [
    "MLP",
    "Attention",
    "BasicBlock",
    "Bottleneck",
    "CifarStem",
    "ClassToken",
    "DepthScaledNormal",
    "ImageNetStem",
    "InpaintingConfig",
    "InpaintingUNet",
    "LabelsToImage",
    "LabelsToImageConfig",
    "LayerIndexNormal",
    "Learned",
    "Llama3Rotary",
    "MeanPooling",
    "Normal",
    "Position",
    "ResNet",
    "ResNetConfig",
    "Rotary",
    "Sinusoidal",
    "SwiGLU",
    "Transformer",
    "TransformerConfig",
    "VisionConfig",
    "VisionTransformer",
    "XavierNormal",
    "from_folder",
    "from_transformers",
]
