"""A slot of the shared memory is used again only when nobody can see its pixels any more."""

from megatron_gmai.data.loading.pixel_memory import PixelMemory


def test_a_slot_is_free_again_when_the_last_view_of_its_pixels_is_gone() -> None:
    memory = PixelMemory(slots=1, images=3, side=4)
    assert memory.take() == 0
    pixels = memory.hand_out(0, 2)
    assert memory.take() is None
    first = pixels[0].float().to(pixels.dtype), pixels[0, 1]
    del pixels
    assert memory.take() is None, "a view of one colour still needs it"
    del first
    assert memory.take() == 0


def test_pixels_are_those_in_the_slot_with_channels_first() -> None:
    memory = PixelMemory(slots=2, images=3, side=4)
    memory.pixels.copy_(memory.pixels.new_tensor(range(3)).expand_as(memory.pixels))
    pixels = memory.hand_out(1, 2)
    assert pixels.shape == (2, 3, 4, 4)
    assert (pixels[:, 2] == 2).all()
    assert pixels.untyped_storage().data_ptr() == memory.pixels[1].data_ptr(), "nothing is copied"


def test_a_micro_batch_without_images_frees_its_slot_too() -> None:
    memory = PixelMemory(slots=1, images=3, side=4)
    assert memory.take() == 0
    assert memory.hand_out(0, 0).shape == (0, 3, 4, 4)
    assert memory.take() == 0
