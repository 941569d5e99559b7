//! Images whose vCPUs have another state, made by way of their serialized form.

use std::sync::Arc;

use clade_vmm::kvm::VcpuState;
use clade_vmm::vm::ForkImage;

const VCPUS: &str = "vcpus";

/// Returns the vCPUs of an image in their serialized form.
///
/// # Panics
/// When the image does not have them.
#[must_use]
pub fn saved_vcpus(image: &ForkImage) -> Vec<VcpuState> {
    let sections = image.sections().expect("sections");
    let (_, bytes) = sections.iter().find(|(name, _)| *name == VCPUS).expect("vCPUs");
    ciborium::de::from_reader_with_buffer(bytes.as_slice(), &mut vec![0; 16 << 10]).expect("vCPUs")
}

/// Returns the image of a VM without devices, with each of its vCPUs changed.
///
/// # Panics
/// When it cannot be read back.
#[must_use]
pub fn with_vcpus(image: &ForkImage, change: impl FnMut(&mut VcpuState)) -> Arc<ForkImage> {
    let mut vcpus = saved_vcpus(image);
    vcpus.iter_mut().for_each(change);
    let mut sections = image.sections().expect("sections");
    let (_, bytes) = sections.iter_mut().find(|(name, _)| *name == VCPUS).expect("vCPUs");
    bytes.clear();
    ciborium::into_writer(&vcpus, bytes).expect("bytes");
    let named = sections.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
    Arc::new(ForkImage::from_sections(named, image.ram().clone(), Vec::new()).expect("an image"))
}
