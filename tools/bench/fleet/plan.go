package main

import "math/rand/v2"

// way is how blobs go to the server or come from it.
type way int

const (
	viaWrite way = iota // ByteStream.Write
	viaBatch            // BatchUpdateBlobs
	viaHTTP             // PUT /cas/HASH
	viaRead             // ByteStream.Read
)

// ways says what each -how consists of; each way gets an equal share of the blobs.
var ways = map[string][]way{
	"write": {viaWrite},
	"batch": {viaBatch},
	"http":  {viaHTTP},
	"read":  {viaRead},
	"mixed": {viaWrite, viaBatch, viaHTTP, viaRead},
	calmly:  {},
}

// blobsPerBatch is how many blobs one BatchUpdateBlobs carries.
const blobsPerBatch = 50

// task is one call to be made until it succeeds: blobs first to first+count of its client.
type task struct {
	way       way
	first     int
	count     int
	cancelled bool // midway, by the client
}

// plan lists the calls of one client, the kinds mixed in an order that depends on the seed alone.
func (o options) plan(client int) []task {
	random := rand.New(rand.NewPCG(uint64(o.seed), uint64(client)))
	var tasks []task
	kinds := ways[o.how]
	for n, w := range kinds {
		first, end := o.share(n, len(kinds))
		each := 1
		if w == viaBatch {
			each = blobsPerBatch
		}
		for ; first < end; first += each {
			tasks = append(tasks, task{w, first, min(each, end-first), random.Float64() < o.cancel})
		}
	}
	if len(kinds) > 1 {
		random.Shuffle(len(tasks), func(i, j int) { tasks[i], tasks[j] = tasks[j], tasks[i] })
	}
	return tasks
}

// share is the range of blobs of the nth of so many parts.
func (o options) share(n, parts int) (first, end int) {
	return o.files * n / parts, o.files * (n + 1) / parts
}
