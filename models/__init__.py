"""Networks to search strategies for: plain Flax, as a user would write them.

Each class has an `input_shape`, the (height, width, channels) of one image that its source uses.
"""

from models.alexnet import AlexNet
from models.alexnet_nnx import AlexNetNNX
from models.lenet import LeNet5
from models.vgg import VGG16

__all__ = ["VGG16", "AlexNet", "AlexNetNNX", "LeNet5"]
