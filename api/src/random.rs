//! Random names, tokens and keys.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Returns `N` random bytes.
///
/// # Errors
/// When the kernel returns an error, or fewer bytes: it returns up to 256 at once.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    if getrandom(&mut bytes, GetRandomFlags::empty())? != N {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

/// Returns `N` random bytes, as hexadecimal digits.
///
/// # Errors
/// As [`random`].
pub fn random_hex<const N: usize>() -> io::Result<String> {
    Ok(hex(&random::<N>()?))
}

/// Returns bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_names_differ() {
        let one = random_hex::<9>().unwrap();
        assert_eq!(one.len(), 18);
        assert_ne!(one, random_hex::<9>().unwrap());
        assert_eq!(hex(&[0, 9, 0xa0, 0xff]), "0009a0ff");
    }
}
