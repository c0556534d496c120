// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title Signatures that carry a round: 65 bytes each (r, s, v), in ascending order of signer.
library Quorum {
    uint256 internal constant ADDRESS_BYTES = 20;
    uint256 private constant SIGNATURE_BYTES = 65;
    /// @dev Half the order of secp256k1: of the two signatures that are valid the one with the lower s is accepted.
    uint256 private constant HALF_ORDER = 0x7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0;

    error BadSignature(uint256 position);
    error SignersNotAscending(uint256 position);

    /// @notice Signatures needed among `live` validators: more than two thirds.
    function needed(uint256 live) internal pure returns (uint256) {
        return (2 * live) / 3 + 1;
    }

    /// @notice How many signatures there are in `signatures`.
    function count(bytes calldata signatures) internal pure returns (uint256 found) {
        found = signatures.length / SIGNATURE_BYTES;
        if (signatures.length != found * SIGNATURE_BYTES) revert BadSignature(found);
    }

    /// @notice Who made the signature of `digest` at `position`, which must be there.
    function recover(bytes32 digest, bytes calldata signatures, uint256 position)
        internal
        pure
        returns (address signer)
    {
        uint256 r;
        uint256 s;
        uint8 v;
        assembly ("memory-safe") {
            let start := add(signatures.offset, mul(position, SIGNATURE_BYTES))
            r := calldataload(start)
            s := calldataload(add(start, 32))
            v := byte(0, calldataload(add(start, 64)))
        }
        signer = ecrecover(digest, v, bytes32(r), bytes32(s));
        if (signer == address(0) || s > HALF_ORDER) revert BadSignature(position);
    }

    /// @notice Writes `signer` as the item at `place` of a packed list with room for it.
    function put(bytes memory signers, uint256 place, address signer) internal pure {
        assembly ("memory-safe") {
            let target := add(add(signers, 0x20), mul(place, ADDRESS_BYTES))
            // Only 20 bytes are changed: the item may be the last.
            mstore(target, or(shl(96, signer), and(mload(target), 0xffffffffffffffffffffffff)))
        }
    }

    /// @notice Drops what is behind the first `size` items.
    function cut(bytes memory signers, uint256 size) internal pure {
        assembly ("memory-safe") {
            mstore(signers, mul(size, ADDRESS_BYTES))
        }
    }
}
