// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title A short list of addresses kept as the code of a contract of its own: dear to change, and read for the price of
/// one access, where an entry in storage costs one access each (the technique is known as SSTORE2).
/// @notice Lists are sorted, so that sorted signers are found in one pass.
library AddressList {
    uint256 private constant ITEM_BYTES = 20;

    error ListNotStored();

    /// @notice The list behind `pointer`; zero is the empty list.
    function load(address pointer) internal view returns (address[] memory list) {
        if (pointer == address(0)) return list;
        uint256 length = (pointer.code.length - 1) / ITEM_BYTES;
        list = new address[](length);
        bytes memory packed = new bytes(length * ITEM_BYTES);
        assembly ("memory-safe") {
            extcodecopy(pointer, add(packed, 0x20), 1, mul(length, ITEM_BYTES))
            let source := add(packed, 0x20)
            let target := add(list, 0x20)
            for { let i := 0 } lt(i, length) { i := add(i, 1) } {
                mstore(target, shr(96, mload(source)))
                source := add(source, ITEM_BYTES)
                target := add(target, 0x20)
            }
        }
    }

    /// @notice Stores `list` anew and returns where.
    function store(address[] memory list) internal returns (address pointer) {
        bytes memory packed = new bytes(0);
        for (uint256 i = 0; i < list.length; ++i) {
            packed = bytes.concat(packed, bytes20(list[i]));
        }
        // Returns what follows its own 11 bytes; the leading STOP keeps the list from ever running as code.
        bytes memory creation = bytes.concat(hex"600b5981380380925939f3", hex"00", packed);
        assembly ("memory-safe") {
            pointer := create(0, add(creation, 0x20), mload(creation))
        }
        if (pointer == address(0)) revert ListNotStored();
    }

    /// @notice Whether `item` is in `list`.
    function contains(address[] memory list, address item) internal pure returns (bool) {
        (uint256 place, bool found) = find(list, item);
        return found && place < list.length;
    }

    /// @notice Where `item` is, or would have to be inserted, in `list`.
    function find(address[] memory list, address item) internal pure returns (uint256 place, bool found) {
        while (place < list.length && list[place] < item) ++place;
        found = place < list.length && list[place] == item;
    }

    /// @notice `list` with `item` at its place.
    function inserted(address[] memory list, uint256 place, address item) internal pure returns (address[] memory longer) {
        longer = new address[](list.length + 1);
        for (uint256 i = 0; i < longer.length; ++i) {
            longer[i] = i < place ? list[i] : i == place ? item : list[i - 1];
        }
    }

    /// @notice `list` without the item at `place`.
    function removed(address[] memory list, uint256 place) internal pure returns (address[] memory shorter) {
        shorter = new address[](list.length - 1);
        for (uint256 i = 0; i < shorter.length; ++i) {
            shorter[i] = i < place ? list[i] : list[i + 1];
        }
    }
}
