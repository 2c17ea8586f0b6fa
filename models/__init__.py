"""Networks to search strategies for: plain Flax, as a user would write them.

Each class has an `input_shape`, the shape of one input that its source uses: (height, width,
channels) of an image or of latents, (height, width, length, channels) of a volume, (samples,
channels) of a waveform. Its attributes make it small enough to try things on; their defaults are
the published ones. All take `train`: dropout is on then, and batch normalization uses the batch's
statistics.
"""

from models.alexnet import AlexNet
from models.alexnet_nnx import AlexNetNNX
from models.convnext import ConvNeXtTiny
from models.denoiser import DenoisingUNet
from models.densenet import DenseNet121
from models.efficientnet import EfficientNetB0
from models.handpose import HandPose
from models.inception import InceptionV3
from models.lenet import LeNet5
from models.mobilenet import MobileNetV2
from models.resnet import ResNet, ResNet18, ResNet50, ResNet101
from models.resnet_nnx import ResNetNNX
from models.speech import SpeechCNN, SpeechM5, SpeechM18
from models.squeezenet import SqueezeNet, SqueezeNet11
from models.unet import UNet
from models.unet3d import UNet3D
from models.vae import VAEDecoder
from models.vgg import VGG16

__all__ = [
    "VGG16",
    "AlexNet",
    "AlexNetNNX",
    "ConvNeXtTiny",
    "DenoisingUNet",
    "DenseNet121",
    "EfficientNetB0",
    "HandPose",
    "InceptionV3",
    "LeNet5",
    "MobileNetV2",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "ResNet101",
    "ResNetNNX",
    "SpeechCNN",
    "SpeechM5",
    "SpeechM18",
    "SqueezeNet",
    "SqueezeNet11",
    "UNet",
    "UNet3D",
    "VAEDecoder",
]
