// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title Reads and applies packed reputation updates.
/// @notice Reputations lie 32 to a storage word; lane i of word w belongs to member 32 w + i, lane 0 in the lowest byte.
/// An update of one word is `uint24 word ‖ uint32 mask ‖ bytes32 lanes`, 39 bytes, with zeros outside the mask. Only lanes
/// in the mask are touched, so that a member who registers while signatures are being collected keeps its reputation.
library ReputationUpdates {
    uint256 internal constant UPDATE_BYTES = 39;
    uint256 private constant ALL_LANES = 0xffffffff;
    uint256 private constant ONES = type(uint256).max / 0xff; // 0x0101…01

    /// @notice The update at `offset`, which the caller has checked to lie within `updates`.
    function read(bytes calldata updates, uint256 offset)
        internal
        pure
        returns (uint256 word, uint256 mask, uint256 lanes)
    {
        assembly ("memory-safe") {
            let start := add(updates.offset, offset)
            let header := calldataload(start)
            word := shr(232, header)
            mask := and(shr(200, header), 0xffffffff)
            lanes := calldataload(add(start, 7))
        }
    }

    /// @notice Whether the update replaces all 32 lanes and blacklists nobody: the common case in a large network.
    function isWhole(uint256 mask, uint256 lanes) internal pure returns (bool) {
        return mask == ALL_LANES && !hasZeroByte(lanes);
    }

    /// @notice `current` with the lanes of `mask` replaced by those of `lanes`, and whether one of them became zero.
    function merge(uint256 current, uint256 mask, uint256 lanes) internal pure returns (uint256 merged, bool zeroed) {
        uint256 kept = ~spread(mask);
        merged = (current & kept) | (lanes & ~kept);
        zeroed = hasZeroByte(lanes | kept);
    }

    /// @notice Whether `mask` is not empty and every lane of it in `word` belongs to one of `total` members.
    function within(uint256 word, uint256 mask, uint256 total) internal pure returns (bool) {
        unchecked {
            uint256 first = word * 32; // below 2^29
            if (total >= first + 32) return mask != 0;
            return mask != 0 && total > first && mask >> (total - first) == 0;
        }
    }

    /// @notice 0xff in every byte of the result whose bit is set in `mask`: bit i gives byte i. `mask` is below 2^32.
    function spread(uint256 mask) internal pure returns (uint256 lanes) {
        unchecked {
            lanes = (mask | (mask << 112)) & 0x0000000000000000000000000000ffff0000000000000000000000000000ffff;
            lanes = (lanes | (lanes << 56)) & 0x00000000000000ff00000000000000ff00000000000000ff00000000000000ff;
            lanes = (lanes | (lanes << 28)) & 0x0000000f0000000f0000000f0000000f0000000f0000000f0000000f0000000f;
            lanes = (lanes | (lanes << 14)) & 0x0003000300030003000300030003000300030003000300030003000300030003;
            lanes = (lanes | (lanes << 7)) & ONES;
            lanes *= 0xff;
        }
    }

    /// @notice Bit i of the result is set where byte i of `lanes` is not zero.
    function nonZero(uint256 lanes) internal pure returns (uint256 mask) {
        unchecked {
            for (uint256 lane = 0; lanes != 0; ++lane) {
                if (lanes & 0xff != 0) mask |= 1 << lane;
                lanes >>= 8;
            }
        }
    }

    /// @notice Whether any of the 32 bytes of `word` is zero.
    function hasZeroByte(uint256 word) internal pure returns (bool) {
        unchecked {
            return ((word - ONES) & ~word & (ONES << 7)) != 0;
        }
    }
}
