package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// blob is one file of one client; the same numbers always give the same bytes.
type blob struct {
	data []byte
	hash string
}

func (o options) blob(client, number int) blob {
	data := bytes.Repeat([]byte{'x'}, o.size)
	copy(data, fmt.Sprintf("%d %d %d ", o.seed, client, number))
	return newBlob(data)
}

func newBlob(data []byte) blob {
	sum := sha256.Sum256(data)
	return blob{data, hex.EncodeToString(sum[:])}
}

func (b blob) digest() *repb.Digest {
	return &repb.Digest{Hash: b.hash, SizeBytes: int64(len(b.data))}
}

// readName is the resource name by which ByteStream.Read finds the blob.
func (b blob) readName() string {
	return fmt.Sprintf("blobs/%s/%d", b.hash, len(b.data))
}

// writeName is a new resource name for an upload of the blob. The server knows an interrupted upload by it.
func (b blob) writeName() string {
	const version4, variant = 0x4000, 0x8000
	return fmt.Sprintf("uploads/%08x-%04x-%04x-%04x-%012x/blobs/%s/%d",
		rand.Uint32(), rand.N(0x10000), version4|rand.N(0x1000), variant|rand.N(0x4000), rand.N[int64](1<<48),
		b.hash, len(b.data))
}
